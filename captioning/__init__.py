"""The library behind the commands: from a photo to a feature map, from a feature map to a caption."""
