# The software Metal driver (csrc/simulator/driver) and what is compiled against it. Linux only.
set(MFA_COMPILE_METAL_CPP "${CMAKE_CURRENT_LIST_DIR}/../csrc/simulator/driver/compile.py")
set(MFA_EMBED_KERNELS "${CMAKE_CURRENT_LIST_DIR}/embed_kernels.py")
cmake_path(ABSOLUTE_PATH MFA_COMPILE_METAL_CPP NORMALIZE)

# add_metal_cpp_sources(target SOURCES a.cpp ... [OPTIONS -I... -D...]): compiles sources that include metal-cpp, with clang,
# into `target`, whose other sources the system's compiler takes.
function(add_metal_cpp_sources target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "SOURCES;OPTIONS")
  set(metal_cpp)
  if(MFA_METAL_CPP_DIR)
    set(metal_cpp --metal-cpp "${MFA_METAL_CPP_DIR}")
  endif()
  set(directory "${CMAKE_CURRENT_BINARY_DIR}/${target}.metal_cpp")
  file(MAKE_DIRECTORY "${directory}")
  foreach(source IN LISTS arg_SOURCES)
    cmake_path(ABSOLUTE_PATH source)
    cmake_path(GET source STEM stem)
    set(object "${directory}/${stem}.o")
    add_custom_command(
      OUTPUT "${object}"
      COMMAND "${Python_EXECUTABLE}" "${MFA_COMPILE_METAL_CPP}" ${metal_cpp} --depfile "${object}.d" -o "${object}"
              -fvisibility=hidden -fvisibility-inlines-hidden -O2 ${arg_OPTIONS} "${source}"
      DEPENDS "${source}" "${MFA_COMPILE_METAL_CPP}"
      DEPFILE "${object}.d"
      COMMENT "metal-cpp ${stem}"
      VERBATIM)
    set_source_files_properties("${object}" PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
    target_sources(${target} PRIVATE "${object}")
  endforeach()
endfunction()

# add_simulated_metal_backend(target): csrc/metal, as on a Mac, over the driver instead of Apple's frameworks.
function(add_simulated_metal_backend target)
  file(GLOB sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/metal/*.cpp")
  file(GLOB kernels CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/metal/*.metal")
  file(GLOB headers CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/metal/*.h" "${PROJECT_SOURCE_DIR}/metal/*.def")
  set(embedded "${CMAKE_CURRENT_BINARY_DIR}/kernel_sources.cpp")
  add_custom_command(
    OUTPUT "${embedded}"
    COMMAND "${Python_EXECUTABLE}" "${MFA_EMBED_KERNELS}" "${embedded}" ${kernels}
    DEPENDS "${MFA_EMBED_KERNELS}" ${kernels} ${headers}
    COMMENT "Embedding the kernels' source"
    VERBATIM)
  get_target_property(torch_includes torch_stable INTERFACE_INCLUDE_DIRECTORIES)
  list(TRANSFORM torch_includes PREPEND -isystem)
  add_metal_cpp_sources(
    ${target}
    SOURCES ${sources} "${embedded}"
    OPTIONS -DMFA_METAL -DTORCH_TARGET_VERSION=0x020a000000000000ULL "-I${PROJECT_SOURCE_DIR}/csrc" ${torch_includes})
  target_compile_definitions(${target} PRIVATE MFA_METAL)
  target_link_libraries(${target} PRIVATE mfa_driver)
endfunction()

if(NOT TARGET mfa_driver)
  add_subdirectory("${CMAKE_CURRENT_LIST_DIR}/../csrc/simulator/driver" "${CMAKE_CURRENT_BINARY_DIR}/driver")
endif()
