package main

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"
)

// bzImage makes an image with setup sectors and a payload behind some code.
func bzImage(sects byte, code, payload []byte) []byte {
	n := int(sects)
	if n == 0 {
		n = 4
	}
	b := make([]byte, (n+1)*512)
	b[0x1f1] = sects
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x206:], 0x20f)
	binary.LittleEndian.PutUint32(b[0x248:], uint32(len(code)))
	binary.LittleEndian.PutUint32(b[0x24c:], uint32(len(payload)))
	return append(append(append(b, code...), payload...), "trailing code"...)
}

func TestPayloadIsFound(t *testing.T) {
	payload := []byte("\xfd7zXZ\x00 and so on")
	for _, sects := range []byte{0, 2, 39} {
		got, err := bzPayload(bzImage(sects, []byte("decompressor"), payload))
		if err != nil || !bytes.Equal(got, payload) {
			t.Errorf("%d setup sectors: %q, %v", sects, got, err)
		}
	}
}

func TestPayloadRefused(t *testing.T) {
	long := bzImage(4, nil, []byte("x"))
	binary.LittleEndian.PutUint32(long[0x24c:], 1<<32-1)
	far := bzImage(4, nil, []byte("x"))
	binary.LittleEndian.PutUint32(far[0x248:], 1<<32-1)
	old := bzImage(4, nil, []byte("x"))
	binary.LittleEndian.PutUint16(old[0x206:], 0x207)
	for name, image := range map[string][]byte{
		"empty": nil, "short": make([]byte, 0x24f), "no magic": make([]byte, 4096), "no payload": bzImage(4, nil, nil),
		"payload past the end": long, "payload far away": far, "old protocol": old,
	} {
		if p, err := bzPayload(image); err == nil {
			t.Errorf("%s: %q", name, p)
		}
	}
}

func TestPayloadEndsWithItsSize(t *testing.T) {
	if c, n, err := splitPayload([]byte("kernel\x01\x02\x00\x00")); string(c) != "kernel" || n != 0x201 || err != nil {
		t.Errorf("%q, %d, %v", c, n, err)
	}
	if _, _, err := splitPayload([]byte("abc")); err == nil {
		t.Error("three bytes are no error")
	}
}

func TestArm64Image(t *testing.T) {
	image := append(make([]byte, 0x38), "ARM\x64...."...)
	if !isArm64Image(image) || isArm64Image(image[:0x3a]) || isArm64Image(image[1:]) {
		t.Error("an Image is not known by its magic number")
	}
}

func TestDecompressor(t *testing.T) {
	for begin, want := range map[string]string{"\xfd7zXZ\x00...": "xz", "(\xb5/\xfd...": "zstd"} {
		if c, err := decompressor([]byte(begin)); err != nil || c[0] != want {
			t.Errorf("%q: %q, %v", begin, c, err)
		}
	}
	if _, err := decompressor([]byte("\x1f\x8b\x08")); err == nil || !strings.Contains(err.Error(), "1f 8b") {
		t.Error(err)
	}
}
