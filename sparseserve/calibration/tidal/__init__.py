"""Which layer should choose again (TidalDecode, arXiv 2410.05076)."""
