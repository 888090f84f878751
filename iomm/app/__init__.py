"""`iomm app`: a page in the browser to generate with one checkpoint. Needs the extra `app`."""
