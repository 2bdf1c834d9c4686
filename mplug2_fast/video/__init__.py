"""Video files and still images to the frames that the model sees."""

from mplug2_fast.video.frames import frame_indices, load_video, read_frames

__all__ = ["frame_indices", "load_video", "read_frames"]
