# libsumo is linked against the libraries of a graphical interface that it never opens. OpenGL's libraries are unpacked
# by hand, because their package would also install a GPU driver and compiler (150 MB).
set -eu
apt-get update
apt-get install --yes --no-install-recommends libx11-6 libxext6 libxrender1 libatomic1
mkdir /tmp/opengl
cd /tmp/opengl
apt-get download libgl1 libglx0 libglvnd0
for package in *.deb; do dpkg --extract "$package" /; done
apt-get clean
rm -rf /tmp/opengl /var/lib/apt/lists/* /var/cache/apt/*.bin
