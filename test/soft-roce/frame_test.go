package main

import (
	"bytes"
	"errors"
	"io"
	"reflect"
	"testing"
	"testing/iotest"
)

// The bytes are a contract between the two ends of the port, which are one program, but of a run that may take hours.
func TestFrameBytes(t *testing.T) {
	got := appendFrame([]byte("x"), frame{kindStdout, 0x01020304, []byte("hi")})
	want := []byte("x\x02\x00\x00\x00\x06\x04\x03\x02\x01hi")
	if !bytes.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestFramesComeBack(t *testing.T) {
	frames := []frame{
		{kindReady, 0, []byte{}},
		{kindExec, 7, bytes.Repeat([]byte("env"), 50_000)},
		{kindStatus, 1<<32 - 1, []byte("bye")},
	}
	var wire bytes.Buffer
	w := &frameWriter{w: &wire}
	for _, f := range frames {
		if err := w.send(f.kind, f.id, f.payload); err != nil {
			t.Fatal(err)
		}
	}
	r := iotest.OneByteReader(&wire) // a port delivers what it likes
	for _, want := range frames {
		got, err := readFrame(r)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got kind %d id %d %d bytes, want kind %d id %d %d bytes",
				got.kind, got.id, len(got.payload), want.kind, want.id, len(want.payload))
		}
	}
	if _, err := readFrame(r); err != io.EOF {
		t.Errorf("after the last frame: %v, want EOF", err)
	}
}

func TestFrameRefused(t *testing.T) {
	whole := appendFrame(nil, frame{kindStdout, 1, []byte("hello")})
	for _, c := range []struct {
		name string
		wire []byte
		want error
	}{
		{"empty", nil, io.EOF},
		{"half a header", whole[:5], io.ErrUnexpectedEOF},
		{"no payload", whole[:frameHeader], io.ErrUnexpectedEOF},
		{"half a payload", whole[:len(whole)-1], io.ErrUnexpectedEOF},
		{"kind 0", make([]byte, frameHeader), errBadFrame},
		{"unknown kind", []byte{0, 0, 0, 0, byte(kindEnd), 0, 0, 0, 0}, errBadFrame},
		{"too long", []byte{0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0}, errBadFrame},
	} {
		if _, err := readFrame(bytes.NewReader(c.wire)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	if err := (&frameWriter{w: io.Discard}).send(kindExec, 1, make([]byte, maxPayload+1)); !errors.Is(err, errBadFrame) {
		t.Errorf("sending too much: %v", err)
	}
}

func TestStreamSendsPieces(t *testing.T) {
	var wire bytes.Buffer
	text := bytes.Repeat([]byte("0123456789"), 10_000)
	s := &stream{&frameWriter{w: &wire}, kindStderr, 3}
	if n, err := s.Write(text); n != len(text) || err != nil {
		t.Fatal(n, err)
	}
	var got []byte
	for wire.Len() > 0 {
		f, err := readFrame(&wire)
		if err != nil || f.kind != kindStderr || f.id != 3 {
			t.Fatal(f.kind, f.id, err)
		}
		got = append(got, f.payload...)
	}
	if !bytes.Equal(got, text) {
		t.Error("the text changed on its way")
	}
}

func TestExecRequestComesBack(t *testing.T) {
	for _, r := range []execRequest{
		{argv: []string{"true"}, dir: "/"},
		{argv: []string{"/bin/sh", "-c", "", "two words"}, env: []string{"A=", "B=\xff\xfe not UTF-8", "C=1\n2"}, dir: "/tmp", merge: true},
	} {
		got, err := decodeExecRequest(r.encode())
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, r) {
			t.Errorf("got %v, want %v", got, r)
		}
	}
}

func TestExecRequestRefused(t *testing.T) {
	good := execRequest{argv: []string{"a"}, env: []string{"b"}, dir: "c"}.encode()
	for i := range good {
		if _, err := decodeExecRequest(good[:i]); !errors.Is(err, errBadFrame) {
			t.Errorf("the first %d bytes: %v", i, err)
		}
	}
	if _, err := decodeExecRequest(append(good, 0)); !errors.Is(err, errBadFrame) {
		t.Errorf("a byte more: %v", err)
	}
	if _, err := decodeExecRequest(execRequest{dir: "/"}.encode()); !errors.Is(err, errBadFrame) {
		t.Errorf("no command: %v", err)
	}
}

func TestExitStatusComesBack(t *testing.T) {
	for _, s := range []exitStatus{{}, {code: 137}, {127, "no such command"}} {
		if got, err := decodeExitStatus(s.encode()); err != nil || got != s {
			t.Errorf("%v: got %v, %v", s, got, err)
		}
	}
	if _, err := decodeExitStatus([]byte{1, 2, 3}); !errors.Is(err, errBadFrame) {
		t.Errorf("three bytes: %v", err)
	}
}

// Whatever comes over the port or a client's socket is an error or a frame that means the same when sent again.
func FuzzFrames(f *testing.F) {
	request := execRequest{argv: []string{"ls", "-l"}, env: []string{"A=B"}, dir: "/"}.encode()
	f.Add(appendFrame(appendFrame(nil, frame{kindExec, 1, request}), frame{kindStdin, 1, nil}))
	f.Add(appendFrame(nil, frame{kindStatus, 2, exitStatus{1, "why"}.encode()}))
	f.Add([]byte{0xff, 0xff, 0xff, 0x00, 1, 0, 0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, wire []byte) {
		r := bytes.NewReader(wire)
		for {
			f, err := readFrame(r)
			if err != nil {
				return
			}
			again, err := readFrame(bytes.NewReader(appendFrame(nil, f)))
			if err != nil || !reflect.DeepEqual(f, again) {
				t.Fatalf("%v became %v, %v", f, again, err)
			}
			if q, err := decodeExecRequest(f.payload); err == nil {
				if q2, err := decodeExecRequest(q.encode()); err != nil || !reflect.DeepEqual(q, q2) {
					t.Fatalf("%v became %v, %v", q, q2, err)
				}
			}
			if s, err := decodeExitStatus(f.payload); err == nil && !bytes.Equal(s.encode(), f.payload) {
				t.Fatalf("%v is not %q", s, f.payload)
			}
		}
	})
}
