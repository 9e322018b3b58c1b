"""What is asked: pictures, text and messages, packed into `ModelInputs`."""
