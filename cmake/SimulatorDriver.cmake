# The software Metal driver (csrc/simulator/driver), and csrc/metal compiled against it. Linux only.
set(MFA_COMPILE_METAL_CPP "${CMAKE_CURRENT_LIST_DIR}/../csrc/simulator/driver/compile.py")
set(MFA_EMBED_KERNELS "${CMAKE_CURRENT_LIST_DIR}/embed_kernels.py")
set(MFA_DRIVER_DIR "${CMAKE_CURRENT_LIST_DIR}/../csrc/simulator/driver")
cmake_path(ABSOLUTE_PATH MFA_COMPILE_METAL_CPP NORMALIZE)
cmake_path(ABSOLUTE_PATH MFA_DRIVER_DIR NORMALIZE)

# add_metal_cpp_objects(variable NAME directory SOURCES a.cpp ... [OPTIONS -I... -D...]): compiles sources that include metal-cpp
# with clang, for linking with what the system's compiler makes; `variable` gets the objects.
function(add_metal_cpp_objects variable)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "NAME" "SOURCES;OPTIONS")
  set(directory "${CMAKE_CURRENT_BINARY_DIR}/${arg_NAME}.metal_cpp")
  file(MAKE_DIRECTORY "${directory}")
  set(objects)
  foreach(source IN LISTS arg_SOURCES)
    cmake_path(ABSOLUTE_PATH source)
    cmake_path(GET source STEM stem)
    set(object "${directory}/${stem}.o")
    add_custom_command(
      OUTPUT "${object}"
      COMMAND "${Python_EXECUTABLE}" "${MFA_COMPILE_METAL_CPP}" --metal-cpp "${MFA_METAL_CPP_DIR}" --depfile "${object}.d" -o "${object}"
              -fvisibility=hidden -fvisibility-inlines-hidden -O2 ${arg_OPTIONS} "${source}"
      DEPENDS "${source}" "${MFA_COMPILE_METAL_CPP}"
      DEPFILE "${object}.d"
      COMMENT "metal-cpp ${stem}"
      VERBATIM)
    set_source_files_properties("${object}" PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
    list(APPEND objects "${object}")
  endforeach()
  set(${variable} ${objects} PARENT_SCOPE)
endfunction()

# add_simulated_metal(target): links csrc/metal, as on a Mac, into `target` (libmfa), over the driver instead of Apple's
# frameworks; defines mfa_simulated, through which mfa.simulate() reaches the same code with CPU tensors.
function(add_simulated_metal target)
  file(GLOB sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/metal/*.cpp")
  file(GLOB kernels CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/metal/*.metal")
  file(GLOB headers CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/metal/*.h" "${PROJECT_SOURCE_DIR}/metal/*.def")
  set(interface "${PROJECT_SOURCE_DIR}/csrc/metal/interface.cpp")  # libmfa's own C ABI
  list(REMOVE_ITEM sources "${interface}")
  set(embedded "${CMAKE_CURRENT_BINARY_DIR}/kernel_sources.cpp")
  add_custom_command(
    OUTPUT "${embedded}"
    COMMAND "${Python_EXECUTABLE}" "${MFA_EMBED_KERNELS}" --compiler "${CMAKE_CXX_COMPILER}" "${embedded}" ${kernels}
    DEPENDS "${MFA_EMBED_KERNELS}" ${kernels} ${headers}
    COMMENT "Embedding the kernels' source"
    VERBATIM)
  get_target_property(torch_includes torch_stable INTERFACE_INCLUDE_DIRECTORIES)
  list(TRANSFORM torch_includes PREPEND -isystem)
  set(options -DMFA_METAL -DTORCH_TARGET_VERSION=0x020a000000000000ULL "-I${PROJECT_SOURCE_DIR}/csrc" ${torch_includes})
  add_metal_cpp_objects(backend NAME backend SOURCES ${sources} "${embedded}" OPTIONS ${options})
  add_metal_cpp_objects(own NAME own SOURCES "${interface}" OPTIONS ${options})
  add_metal_cpp_objects(
    launcher NAME launcher SOURCES "${PROJECT_SOURCE_DIR}/csrc/simulator/metal_launcher.cpp" OPTIONS ${options})
  add_custom_target(mfa_backend_objects DEPENDS ${backend})

  target_sources(${target} PRIVATE ${backend} ${own})
  target_compile_definitions(${target} PRIVATE MFA_METAL)
  target_link_libraries(${target} PRIVATE mfa_driver)

  set(map "${PROJECT_SOURCE_DIR}/csrc/simulator/metal_launcher.map")
  add_library(mfa_simulated SHARED ${backend} ${launcher})
  target_link_libraries(mfa_simulated PRIVATE mfa_driver mfa_simulator)
  target_link_options(mfa_simulated PRIVATE "-Wl,--version-script=${map}" -Wl,--no-undefined)
  set_target_properties(mfa_simulated PROPERTIES LINKER_LANGUAGE CXX LINK_DEPENDS "${map}")
  add_dependencies(${target} mfa_backend_objects)
  add_dependencies(mfa_simulated mfa_backend_objects)

  # A "metallib" on Linux names a library for the simulator: see csrc/simulator/driver/library.cpp.
  file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/mfa.metallib" "mfa-simulator-metallib\n")
  file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/mfa_metal4.metallib" "mfa-simulator-metallib\n+_metal4\n")
  install(TARGETS mfa_driver mfa_simulated DESTINATION mfa)
  install(FILES "${CMAKE_CURRENT_BINARY_DIR}/mfa.metallib" "${CMAKE_CURRENT_BINARY_DIR}/mfa_metal4.metallib"
          DESTINATION mfa)
endfunction()

if(NOT MFA_METAL_CPP_DIR)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/find_metal_cpp.py"
    OUTPUT_VARIABLE MFA_METAL_CPP_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()

enable_language(ASM)
if(NOT TARGET mfa_driver)
  add_subdirectory("${MFA_DRIVER_DIR}" "${CMAKE_CURRENT_BINARY_DIR}/driver")
  # Everything lies in one directory, in the build tree as in the package.
  set_target_properties(mfa_driver PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}")
endif()
