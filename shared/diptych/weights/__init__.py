"""Model weights in Hugging Face format: families, directories, canonical tensor names."""
