"""The family LLaVA-OneVision: pictures, not yet videos."""
