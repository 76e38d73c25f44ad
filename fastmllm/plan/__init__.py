"""What an image costs on paper: resolution policy, compressor, language model and device, before anything is loaded."""
