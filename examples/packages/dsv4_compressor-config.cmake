# find_package(dsv4_compressor): what make install puts below PREFIX/share/cmake. It may be moved with its prefix.
if(NOT TARGET dsv4_compressor::dsv4_compressor)
  add_library(dsv4_compressor::dsv4_compressor INTERFACE IMPORTED)
  get_filename_component(_dsv4_compressor_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
  set_target_properties(dsv4_compressor::dsv4_compressor PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${_dsv4_compressor_prefix}/include")
  unset(_dsv4_compressor_prefix)
  if(UNIX)
    set_target_properties(dsv4_compressor::dsv4_compressor PROPERTIES INTERFACE_LINK_LIBRARIES m)
  endif()
endif()
