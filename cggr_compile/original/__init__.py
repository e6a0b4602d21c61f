"""The surface of the original CGGR library, in plain torch."""
