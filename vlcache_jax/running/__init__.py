"""Running a model: pure stages, and the one loop above them."""
