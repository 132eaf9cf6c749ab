package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// localFile is a remote file without a network.
type localFile struct {
	*session
	spoil func(k uint64, data []byte)
}

func (l localFile) size() int64       { return l.session.size }
func (l localFile) mode() fs.FileMode { return l.session.mode }
func (l localFile) load(_ context.Context, k uint64) (int, error) {
	return l.session.load(k)
}
func (l localFile) finish(context.Context) ([]byte, error) { return l.session.finish() }
func (l localFile) fetch(ctx context.Context, k uint64, n int) ([]byte, error) {
	data := bytes.Clone(l.staging[k%slots*chunkBytes:][:n])
	if l.spoil != nil {
		l.spoil(k, data)
	}
	return data, ctx.Err()
}

func randomFile(t *testing.T, path string, size int) []byte {
	t.Helper()
	data := make([]byte, size)
	rand.NewChaCha8([32]byte{1}).Read(data)
	if err := os.WriteFile(path, data, 0o640); err != nil {
		t.Fatal(err)
	}
	return data
}

func openLocal(t *testing.T, dir, name string) localFile {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	s, err := openSession(root, name, make([]byte, stagingBytes))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.close() })
	return localFile{session: s}
}

func TestReceive(t *testing.T) {
	for _, size := range []int{0, 1, chunkBytes - 1, chunkBytes, chunkBytes + 1, slots * chunkBytes, 9*chunkBytes + 77} {
		dir := t.TempDir()
		data := randomFile(t, filepath.Join(dir, "a"), size)
		sum, err := receive(t.Context(), openLocal(t, dir, "a"), filepath.Join(dir, "b"))
		if err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		if want := sha256.Sum256(data); !bytes.Equal(sum, want[:]) {
			t.Errorf("%d bytes: sum %x", size, sum)
		}
		got, err := os.ReadFile(filepath.Join(dir, "b"))
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes: the copy differs (%v)", size, err)
		}
		info, err := os.Stat(filepath.Join(dir, "b"))
		if err != nil || info.Mode().Perm() != 0o640 && os.PathSeparator == '/' {
			t.Errorf("mode %v, %v", info.Mode(), err)
		}
	}
}

// The server's files may be open to all; a copy is no more so than any new file here.
func TestReceiveUmask(t *testing.T) {
	dir := t.TempDir()
	randomFile(t, filepath.Join(dir, "a"), 1)
	if err := os.Chmod(filepath.Join(dir, "a"), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "new"), nil, 0o666); err != nil {
		t.Fatal(err)
	}
	if _, err := receive(t.Context(), openLocal(t, dir, "a"), filepath.Join(dir, "b")); err != nil {
		t.Fatal(err)
	}
	want, err := os.Stat(filepath.Join(dir, "new"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.Stat(filepath.Join(dir, "b"))
	if err != nil || got.Mode() != want.Mode() {
		t.Errorf("mode %v, %v; want %v", got.Mode(), err, want.Mode())
	}
}

// What goes wrong leaves no file behind, and the one that was there untouched.
func TestReceiveFails(t *testing.T) {
	dir := t.TempDir()
	randomFile(t, filepath.Join(dir, "a"), 6*chunkBytes)
	local := filepath.Join(dir, "out", "b")
	if err := os.Mkdir(filepath.Dir(local), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(local, []byte("before"), 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	fails := func(name string, want error, f remoteFile) {
		t.Helper()
		if _, err := receive(ctx, f, local); !errors.Is(err, want) {
			t.Errorf("%s: %v", name, err)
		}
		entries, err := os.ReadDir(filepath.Dir(local))
		if err != nil || len(entries) != 1 {
			t.Errorf("%s: left behind: %v, %v", name, entries, err)
		}
		if b, err := os.ReadFile(local); err != nil || string(b) != "before" {
			t.Errorf("%s: the old file is now %.20q, %v", name, b, err)
		}
	}
	f := openLocal(t, dir, "a")
	f.spoil = func(k uint64, data []byte) {
		if k == 5 {
			data[100] ^= 1
		}
	}
	fails("a flipped bit", errSum, f)

	f = openLocal(t, dir, "a")
	f.spoil = func(k uint64, _ []byte) {
		if k == 1 {
			os.Truncate(filepath.Join(dir, "a"), chunkBytes)
		}
	}
	fails("cut short", errChanged, f)

	randomFile(t, filepath.Join(dir, "a"), 2*chunkBytes)
	f = openLocal(t, dir, "a")
	f.spoil = func(uint64, []byte) {
		os.Chtimes(filepath.Join(dir, "a"), time.Time{}, time.Unix(1, 0))
	}
	fails("touched", errChanged, f)

	randomFile(t, filepath.Join(dir, "a"), (slots+2)*chunkBytes)
	f = openLocal(t, dir, "a")
	f.spoil = func(k uint64, _ []byte) {
		if k == 1 {
			cancel()
		}
	}
	fails("cancelled", context.Canceled, f)
	if _, err := receive(t.Context(), openLocal(t, dir, "a"), dir); err == nil {
		t.Error("a directory was overwritten")
	}
	if _, err := receive(t.Context(), openLocal(t, dir, "a"), filepath.Join(dir, "no", "b")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing directory: %v", err)
	}
}

func TestOpenSession(t *testing.T) {
	dir := t.TempDir()
	randomFile(t, filepath.Join(dir, "secret"), 10)
	inner := filepath.Join(dir, "inner")
	if err := os.Mkdir(inner, 0o755); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(inner)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if err := os.Symlink("../secret", filepath.Join(inner, "link")); err != nil {
		t.Log(err) // Windows without the right to
	}
	for _, path := range []string{"missing", "../secret", "link", ".", "", "/etc/passwd"} {
		if s, err := openSession(root, path, nil); err == nil {
			s.close()
			t.Errorf("%q was opened", path)
		} else {
			t.Log(err)
		}
	}
}

func TestSessionOrder(t *testing.T) {
	dir := t.TempDir()
	randomFile(t, filepath.Join(dir, "a"), chunkBytes+1)
	s := openLocal(t, dir, "a").session
	for _, k := range []uint64{1, 2, 1 << 63} {
		if _, err := s.load(k); !errors.Is(err, errOrder) {
			t.Errorf("chunk %d: %v", k, err)
		}
	}
	if _, err := s.finish(); !errors.Is(err, errOrder) {
		t.Error(err)
	}
	s.close()
	if _, err := s.load(0); !errors.Is(err, fs.ErrClosed) {
		t.Error(err)
	}
	if err := s.close(); err != nil {
		t.Error(err)
	}
}
