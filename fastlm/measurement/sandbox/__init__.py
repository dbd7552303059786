"""Running one untrusted Python program where it can harm nothing: isolation, limits, verdict."""
