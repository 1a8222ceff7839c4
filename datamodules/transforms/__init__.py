"""Image transforms: augmentation on the host; normalisation, erasing and mixing on the device."""
