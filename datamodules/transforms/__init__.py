"""What happens to a picture: augmentation on the host; normalisation, erasing and mixing on the device."""
