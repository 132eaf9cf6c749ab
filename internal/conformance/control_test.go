package conformance

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

func TestControlFrames(t *testing.T) {
	var b bytes.Buffer
	if err := writeFrame(&b, &request{ID: 7, Op: "x", Args: []byte(`{"A":1}`)}); err != nil {
		t.Fatal(err)
	}
	whole := b.Bytes()
	var got request
	if err := readFrame(bytes.NewReader(whole), &got); err != nil || got.ID != 7 || got.Op != "x" || string(got.Args) != `{"A":1}` {
		t.Errorf("got %+v, %v", got, err)
	}
	for n := range len(whole) {
		want := io.ErrUnexpectedEOF
		if n == 0 || n == 4 {
			want = io.EOF
		}
		if err := readFrame(bytes.NewReader(whole[:n]), &got); !errors.Is(err, want) {
			t.Errorf("%d of %d bytes: %v, want %v", n, len(whole), err, want)
		}
	}
	if err := readFrame(strings.NewReader("\xff\xff\xff\xff"), &got); err == nil || !strings.Contains(err.Error(), "at most") {
		t.Errorf("oversized frame: %v", err)
	}
}

// A side in another process gives the script the same answers and errors as one here.
func TestControlPeer(t *testing.T) {
	testutil.CheckLeaks(t)
	p, err := startPeer("")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.stop(); err != nil {
			t.Error(err)
		}
	}()
	c := &C{T: t}
	for _, s := range []*Side{{c: c, name: "here", local: newHost()}, {c: c, name: "there", remote: p}} {
		if _, err := call(s, opPD, none{}); !errors.Is(err, errNotThere) {
			t.Errorf("%s: %v, want errNotThere", s.name, err)
		}
		if _, err := call(s, opOpen, openArgs{Device: "no such device"}); err == nil {
			t.Errorf("%s: a device that does not exist was opened", s.name)
		}
		do(s, opCloseAll, none{})
	}
	s := &Side{c: c, name: "there", remote: p}
	if err := p.roundTrip("no such operation", none{}, &none{}); err == nil || !strings.Contains(err.Error(), "unknown operation") {
		t.Errorf("unknown operation: %v", err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				if _, err := call(s, opClose, 99); !errors.Is(err, errNotThere) {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	p.kill()
	if _, err := call(s, opClose, 99); !errors.Is(err, errPeerGone) {
		t.Errorf("after kill: %v, want errPeerGone", err)
	}
}
