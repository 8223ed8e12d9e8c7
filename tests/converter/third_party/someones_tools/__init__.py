"""Somebody else's converters and loaders, as another project would install them."""
