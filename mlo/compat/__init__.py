"""Other libraries' interfaces on top of `mlo`, for programs that were written for them."""
