"""A merged file knows what it is: the notation, and the names and digests of what went in."""

import clipmerge as cm

soup = cm.load("clipmerge-demo/uniform.safetensors")
print(soup.record["notation"])
for name, parent in soup.record["parents"].items():
    print(f"  {name}: {parent['file']} {parent['digest'][:12]}")
