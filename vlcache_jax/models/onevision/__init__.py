"""The family LLaVA-OneVision: pictures and videos."""
