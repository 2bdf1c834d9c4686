# Kernels for GPUs of compute capability 9.0, on CUTLASS: built where there are a CUDA compiler and CUTLASS's headers.
# Says in MPLUG2_NO_CUDA_BECAUSE why they are not.
set(MPLUG2_CUDA auto CACHE STRING "Kernels for GPUs: auto (where they can be built), required or off")
set(MPLUG2_CUTLASS "" CACHE PATH "The folder of CUTLASS that holds cutlass/ and cute/; of Python's nvidia-cutlass if empty")

set(MPLUG2_NO_CUDA_BECAUSE "")
if(MPLUG2_CUDA STREQUAL off)
  set(MPLUG2_NO_CUDA_BECAUSE "they were turned off by MPLUG2_FAST_CUDA")
else()
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT MPLUG2_CUTLASS)
    # Told by its place, for importing it wants packages that a build does without.
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c
        "from importlib.util import find_spec; print(find_spec('cutlass_library').submodule_search_locations[0])"
      OUTPUT_VARIABLE folder OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    set(headers "${folder}/source/include")
  else()
    set(headers "${MPLUG2_CUTLASS}")
  endif()
  if(NOT CMAKE_CUDA_COMPILER)
    set(MPLUG2_NO_CUDA_BECAUSE "there was no CUDA compiler when mplug2_fast was installed")
  elseif(NOT EXISTS "${headers}/cutlass/version.h")
    set(MPLUG2_NO_CUDA_BECAUSE
      "CUTLASS was not found when mplug2_fast was installed: pip install nvidia-cutlass, or name its include folder in MPLUG2_FAST_CUTLASS")
  else()
    set(CMAKE_CUDA_ARCHITECTURES 90a-real)
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.3)
      set(MPLUG2_NO_CUDA_BECAUSE "CUDA 12.3 or later is needed, not ${CMAKE_CUDA_COMPILER_VERSION}")
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
  target_include_directories(kernels_cuda SYSTEM PRIVATE "${headers}")
  target_compile_features(kernels_cuda PRIVATE cuda_std_17)
  target_compile_options(kernels_cuda PRIVATE --expt-relaxed-constexpr -Xcompiler=-fvisibility=hidden)
  target_sources(_C PRIVATE csrc/bind/linear_act_cuda.cpp)
  target_compile_definitions(_C PRIVATE MPLUG2_CUDA)
  target_link_libraries(_C PRIVATE kernels_cuda CUDA::cudart_static)
endif()
target_compile_definitions(_C PRIVATE "MPLUG2_NO_CUDA_BECAUSE=\"${MPLUG2_NO_CUDA_BECAUSE}\"")
