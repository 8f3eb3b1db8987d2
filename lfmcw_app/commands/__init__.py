"""The command lines; `python -m lfmcw_app` lists them."""
