"""The container formats that are allowed.

libav supports many more: lists of other files, network protocols, devices, and text that it renders. A file that libav
recognises as one of those is not opened.
"""

from __future__ import annotations

PICTURE_FORMAT = "jpeg_pipe"
"""The format of one JPEG picture."""

_VIDEO = (
    "3dostr 4xm amv anm apng apv asf av1 avi avs avs2 avs3 bethsoftvid bfi bink bmv c93 cavsvideo cdxl cine dcstr derf "
    "dfa dhav dirac dnxhd dv dxa ea evc film_cpk filmstrip flic flv frm gdv gif gxf h261 h263 h264 hevc hnm idcin iff "
    "ifv ingenient ipmovie ipu iss iv8 ivf ivr jpegxl_anim jv kux live_flv lmlm4 lvf lxf m4v matroska mgsts mjpeg "
    "mjpeg_2000 mm mods moflex mov mpeg mpegts mpegvideo mpjpeg msf mtv mv mvi mxf nsv nut nuv obu ogg paf pdv pmp "
    "psxstr pva r3d rl2 rm roq rpl sdr2 sds sdx ser siff smjpeg smk smush swf thp tiertexseq tmv ty usm vc1 vc1test "
    "vividas vivo vmd vvc wc3movie webm wsvqa wtv xmv yop yuv4mpegpipe"
)
_PICTURES = (
    "image2 fits ico alias_pix brender_pix bmp_pipe cri_pipe dds_pipe dpx_pipe exr_pipe gem_pipe gif_pipe hdr_pipe "
    "j2k_pipe jpeg_pipe jpegls_pipe jpegxl_pipe jpegxs_pipe pam_pipe pbm_pipe pcx_pipe pfm_pipe pgm_pipe pgmyuv_pipe "
    "pgx_pipe phm_pipe photocd_pipe pictor_pipe png_pipe ppm_pipe psd_pipe qdraw_pipe qoi_pipe sgi_pipe sunrast_pipe "
    "tiff_pipe txd vbn_pipe webp_pipe xbm_pipe xpm_pipe xwd_pipe"
)
# Formats without video: they are allowed so that the error can state this.
_SOUND = "aac ac3 amr ape dts eac3 flac mp3 mpc mpc8 tta wv"

MEDIA_FORMATS = tuple(f"{_VIDEO} {_PICTURES} {_SOUND}".split())
