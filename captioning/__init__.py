"""What the commands share: from a photo to a feature map, from a feature map to a caption."""
