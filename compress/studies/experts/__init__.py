"""`compress experts`: what a model's experts do, and what it would lose without some of them."""
