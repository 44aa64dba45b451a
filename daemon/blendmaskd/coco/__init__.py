"""COCO annotations: categories, instances checked whole, average precision."""
