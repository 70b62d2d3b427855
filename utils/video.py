"""Video in: probing, sampling and decoding clips with their true times."""

from utils.video_writer import write_mp4

__all__ = ["write_mp4"]
