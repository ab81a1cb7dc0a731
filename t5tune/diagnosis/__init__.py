"""The checks of `t5tune doctor`."""
