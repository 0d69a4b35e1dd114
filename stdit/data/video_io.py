"""draft"""
import av, numpy as np
from PIL import Image
class VideoReader:
    def __init__(self,path): self.c=av.open(str(path)); self.f=[f.to_ndarray(format='rgb24') for f in self.c.decode(video=0)]
    def __enter__(self): return self
    def __exit__(self,*a): self.c.close()
    def __len__(self): return len(self.f)
    def get_frames(self,i): return np.stack([self.f[k] for k in i])
def write_contact_sheet(path, clips):
    rows=[np.concatenate(list(((c.float().clamp(-1,1)+1)*127.5).round().byte().permute(1,2,3,0).numpy()),1) for c in clips]
    Image.fromarray(np.concatenate(rows,0)).save(path)
