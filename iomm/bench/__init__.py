"""`iomm bench`: what a design choice costs or saves, both sides in one run."""
