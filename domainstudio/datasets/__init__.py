"""Reading, checking and packing images; the demo's domains; pictures of batches. Nothing here needs torch."""

from domainstudio.datasets.image_set import ImageRecord, ImageSet, Refusal
from domainstudio.datasets.pictures import contact_sheet, grid, save_png

__all__ = ["ImageRecord", "ImageSet", "Refusal", "contact_sheet", "grid", "save_png"]
