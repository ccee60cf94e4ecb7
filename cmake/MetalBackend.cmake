# add_metal_backend(target): compiles csrc/metal into `target`, for macOS, with the kernels' source for a machine without a
# metallib. (On Linux: SimulatorDriver.cmake.)
# metal-cpp comes from MFA_METAL_CPP_DIR, or from the package mlx-metal.
function(add_metal_backend target)
  if(NOT MFA_METAL_CPP_DIR)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/find_metal_cpp.py"
      OUTPUT_VARIABLE MFA_METAL_CPP_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  endif()

  file(GLOB sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/metal/*.cpp")
  file(GLOB kernels CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/metal/*.metal")
  file(GLOB headers CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/metal/*.h" "${PROJECT_SOURCE_DIR}/metal/*.def")
  set(embed "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/embed_kernels.py")
  set(embedded "${CMAKE_CURRENT_BINARY_DIR}/kernel_sources.cpp")
  add_custom_command(
    OUTPUT "${embedded}"
    COMMAND "${Python_EXECUTABLE}" "${embed}" --compiler "${CMAKE_CXX_COMPILER}" "${embedded}" ${kernels}
    DEPENDS "${embed}" ${kernels} ${headers}
    COMMENT "Embedding the kernels' source"
    VERBATIM)

  target_sources(${target} PRIVATE ${sources} "${embedded}")
  target_include_directories(${target} PRIVATE "${PROJECT_SOURCE_DIR}/csrc")
  target_include_directories(${target} SYSTEM PRIVATE "${MFA_METAL_CPP_DIR}")
  target_compile_definitions(${target} PRIVATE MFA_METAL)
  # NS::SharedPtr sends release to null, from which clang would conclude that it never is null, and drop later checks.
  target_compile_options(${target} PRIVATE -fno-delete-null-pointer-checks)
  target_link_libraries(${target} PRIVATE "-framework Metal" "-framework Foundation" objc)
endfunction()
