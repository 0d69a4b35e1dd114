"""The errors of reading media."""


class VideoError(ValueError):
    """A file that cannot be read as video or picture, or not completely; the message has file, reason and remedy."""


class StoreError(VideoError):
    """A store that refuses, or does not answer."""


class NoAnswerError(StoreError):
    """A store gave no answer in time."""
