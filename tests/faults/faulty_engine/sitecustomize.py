"""Makes the timed engine fail by an image's width, in workers that have this folder on PYTHONPATH; for tests only."""
import os
import signal
import sys
import time

if sys.argv[:1] == ["-m"]:  # `python -m workers`, before its module is found
    from workers.engines import TimedEngine

    prepare, segment = TimedEngine.prepare, TimedEngine.segment

    def faulty_prepare(self, image):
        if image.shape[1] == 11:
            os.kill(os.getpid(), signal.SIGSEGV)
        return prepare(self, image)

    def faulty_segment(self, batch):
        widths = {item.image_size[1] for item in batch}
        if 12 in widths:
            os.kill(os.getpid(), signal.SIGKILL)
        if 13 in widths:
            raise RuntimeError("this image is not to the engine's taste")
        if 14 in widths:
            time.sleep(3600)
        return segment(self, batch)

    TimedEngine.prepare, TimedEngine.segment = faulty_prepare, faulty_segment
