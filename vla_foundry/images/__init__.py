"""Images between bytes and batches: decode, resize, rotate, augment, encode, and turn into model inputs.

An image is a uint8 tensor [3, H, W] of RGB whose memory is channels-last; sizes are (height, width). Depth is a uint16
tensor [H, W]. Whatever moves pixels also returns a `PixelMap`, so that intrinsics, points and boxes can follow.
"""
