# Kernels for GPUs of compute capability 9.0: built where there is a CUDA compiler. Says in MPLUG2_NO_CUDA_BECAUSE why
# they are not.
set(MPLUG2_CUDA auto CACHE STRING "Kernels for GPUs: auto (where they can be built), required or off")

set(MPLUG2_NO_CUDA_BECAUSE "")
if(MPLUG2_CUDA STREQUAL off)
  set(MPLUG2_NO_CUDA_BECAUSE "they were turned off by MPLUG2_FAST_CUDA")
else()
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(MPLUG2_NO_CUDA_BECAUSE "there was no CUDA compiler when mplug2_fast was installed")
  else()
    set(CMAKE_CUDA_ARCHITECTURES 90a-real)
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.5)  # cudaGetDriverEntryPointByVersion
      set(MPLUG2_NO_CUDA_BECAUSE "CUDA 12.5 or later is needed, not ${CMAKE_CUDA_COMPILER_VERSION}")
    endif()
  endif()
endif()

if(MPLUG2_NO_CUDA_BECAUSE AND MPLUG2_CUDA STREQUAL required)
  message(FATAL_ERROR "Kernels for GPUs are required: ${MPLUG2_NO_CUDA_BECAUSE}")
endif()

if(NOT MPLUG2_NO_CUDA_BECAUSE)
  file(GLOB sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_LIST_DIR}/*.cu")
  add_library(kernels_cuda OBJECT ${sources})
  target_include_directories(kernels_cuda PRIVATE csrc)
  target_compile_features(kernels_cuda PRIVATE cuda_std_17)
  target_compile_options(kernels_cuda PRIVATE -Xcompiler=-fvisibility=hidden,-Wall,-Wextra,-Werror)
  target_sources(_C PRIVATE csrc/bind/linear_act_cuda.cpp)
  set_target_properties(_C PROPERTIES CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")  # it was made before it was set
  target_compile_definitions(_C PRIVATE MPLUG2_CUDA)
  target_link_libraries(_C PRIVATE kernels_cuda CUDA::cudart_static)
endif()
target_compile_definitions(_C PRIVATE "MPLUG2_NO_CUDA_BECAUSE=\"${MPLUG2_NO_CUDA_BECAUSE}\"")
