"""What each pixel and each visual token costs and buys: measured on your own model, with a report."""
