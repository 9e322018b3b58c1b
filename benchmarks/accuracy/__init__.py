"""Does a compressed cache give the same answers? Tasks on drawn pictures, and their metrics."""
