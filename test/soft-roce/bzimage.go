package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// bzPayload finds the compressed kernel in a bzImage (Documentation/x86/boot.rst, protocol 2.08 and later).
func bzPayload(image []byte) ([]byte, error) {
	const (
		setupSects    = 0x1f1
		magic         = 0x202
		version       = 0x206
		payloadOffset = 0x248
		payloadLength = 0x24c
		headerEnd     = 0x250
	)
	if len(image) < headerEnd || string(image[magic:magic+4]) != "HdrS" {
		return nil, errors.New("not a bzImage: no HdrS at 0x202")
	}
	if v := binary.LittleEndian.Uint16(image[version:]); v < 0x208 {
		return nil, fmt.Errorf("bzImage of boot protocol %#x: 0x208 is the first that says where the kernel is", v)
	}
	sects := uint64(image[setupSects])
	if sects == 0 {
		sects = 4
	}
	start := (sects+1)*512 + uint64(binary.LittleEndian.Uint32(image[payloadOffset:]))
	end := start + uint64(binary.LittleEndian.Uint32(image[payloadLength:]))
	if start >= end || end > uint64(len(image)) {
		return nil, fmt.Errorf("bzImage of %d bytes says that its kernel is at %d to %d", len(image), start, end)
	}
	return image[start:end], nil
}

// isArm64Image is whether a kernel is what arm64's boot loaders start (Documentation/arm64/booting.rst).
func isArm64Image(image []byte) bool {
	const magic = 0x38
	return len(image) >= magic+4 && string(image[magic:magic+4]) == "ARM\x64"
}

// splitPayload separates the compressed kernel from what the payload ends with: its uncompressed size.
func splitPayload(payload []byte) (compressed []byte, size uint32, err error) {
	n := len(payload) - 4
	if n < 0 {
		return nil, 0, fmt.Errorf("a kernel of %d bytes", len(payload))
	}
	return payload[:n], binary.LittleEndian.Uint32(payload[n:]), nil
}

// decompressor returns the command that decompresses a kernel from its standard input.
func decompressor(compressed []byte) ([]string, error) {
	switch {
	case bytes.HasPrefix(compressed, []byte("\xfd7zXZ\x00")):
		return []string{"xz", "-dc"}, nil
	case bytes.HasPrefix(compressed, []byte("(\xb5/\xfd")):
		return []string{"zstd", "-dc"}, nil
	}
	return nil, fmt.Errorf("a kernel that is compressed with neither xz nor zstd (it begins % x)", compressed[:min(6, len(compressed))])
}
