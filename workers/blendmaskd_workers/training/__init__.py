"""Training BlendMask on a data set in COCO's format: for fine-tuning and for the demo, no training framework."""
