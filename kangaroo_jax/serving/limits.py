"""What a request may ask for, and what all requests together may hold. Each bound is a flag of `kangaroo serve`."""

import dataclasses

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds; the flag of each is its name with hyphens."""

    max_body_mb: int = 64  # bytes of one request, counted as they come
    max_bodies_mb: int = 512  # of all requests that are being read or whose media are being written
    max_body_seconds: float = 60.0  # for a request to come in whole
    max_messages: int = 512
    max_media: int = 16  # images and videos of one request
    max_listed_frames: int = 512  # frames of a video that is given as a list or a folder
    max_media_mb: int = 1024  # of one file
    max_folder_mb: int = 8192  # of all files written for requests that are under way
    max_named_mb: int = 1024  # of media that clients gave a uuid, kept for requests to come
    max_frames: int = 0  # sampled from one video; 0: as in training
    max_request_frames: int = 512  # of all media of one request
    max_frames_in_flight: int = 2048  # of all requests whose media are being decoded
    max_requests: int = 64  # under way or waiting
    max_key_requests: int = 16  # of one API key
    max_choices: int = 8  # n
    max_fetch_seconds: float = 30.0  # for one address
    max_decode_seconds: float = 120.0  # for one file
    max_decoder_mb: int = 4096  # memory of a process that decodes; 0: no bound
    max_request_seconds: float = 900.0  # from the first byte to the last
