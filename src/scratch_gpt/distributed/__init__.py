"""How one model and its optimizer are placed on several processes."""
