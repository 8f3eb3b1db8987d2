"""Other libraries' interfaces on `mlo`, for programs that were written for them."""
