"""A run as a folder of web pages that caption photos in the browser: `python -m captioning.export RUN --format web`."""
