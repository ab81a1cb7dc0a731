"""The Hugging Face Hub: downloading bases, adapters and data, and uploading results."""
