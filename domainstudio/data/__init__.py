"""Images: listed, read, checked and packed; prompts; pictures of batches. Nothing here needs torch."""

from domainstudio.data.image_set import ImageRecord, ImageSet, Refusal, find_captions
from domainstudio.data.pictures import contact_sheet, grid, save_png

__all__ = ["ImageRecord", "ImageSet", "Refusal", "contact_sheet", "find_captions", "grid", "save_png"]
