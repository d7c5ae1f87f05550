"""`kangaroo bench`: how fast training, data, packing, conversion, curation and annotation are."""
