"""A photo -> Grid: decoding, the transform, the CNN."""
