package rpc

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// recorder is the handler of a raw link: it keeps copies of what arrives.
type recorder struct {
	mu     sync.Mutex
	frames [][]byte
	closed chan struct{}
}

func (r *recorder) handleMessage(m message) {
	r.mu.Lock()
	r.frames = append(r.frames, append([]byte(nil), m.b...))
	r.mu.Unlock()
}
func (r *recorder) handleEOF()        {}
func (r *recorder) handleClose(error) { close(r.closed) }

func (r *recorder) got() [][]byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([][]byte(nil), r.frames...)
}

// sendRaw sends bytes that need not be a frame.
func sendRaw(l *fakeLink, b []byte) error {
	buf, err := l.alloc(context.Background(), len(b))
	if err != nil {
		return err
	}
	copy(buf.b, b)
	return l.post(buf, len(b))
}

// garbageFrames are frames that break the format or that no honest client sends.
func garbageFrames() map[string][]byte {
	return map[string][]byte{
		"empty":             {},
		"text":              []byte("GET / HTTP/1.1\r\nHost: example\r\n\r\n"),
		"zeroes":            make([]byte, 100),
		"short":             make([]byte, headerLen-1),
		"old version":       append([]byte{0}, frameOf(header{kind: kindRequest, word: 1}, nil, "")[1:]...),
		"response":          frameOf(header{kind: kindResponse, id: 1}, nil, ""),
		"goaway":            frameOf(header{kind: kindGoAway}, nil, ""),
		"unknown kind":      frameOf(header{kind: 77}, nil, ""),
		"length beyond end": frameOf(header{kind: kindRequest, word: 1}, nil, "abc")[:headerLen+1],
		"bulk beyond end":   frameOf(header{kind: kindRequest, word: 1}, []mr.RemoteKey{{Len: 1, Access: ib.AccessRemoteRead}}, "")[:headerLen+3],
		"bulk no access":    frameOf(header{kind: kindRequest, word: uint32(mEcho)}, []mr.RemoteKey{{}}, ""),
	}
}

func TestGarbageToServer(t *testing.T) {
	for name, b := range garbageFrames() {
		t.Run(name, func(t *testing.T) {
			testutil.CheckLeaks(t)
			a, l := newFakePair(t, 8, fakeMax)
			ts := newTestServer(nil)
			defer ts.Close()
			sc, err := ts.attach(l, nil)
			if err != nil {
				t.Fatal(err)
			}
			rec := &recorder{closed: make(chan struct{})}
			a.setHandler(rec)
			go a.drive()
			go l.drive()
			if err := sendRaw(a, b); err != nil {
				t.Fatal(err)
			}
			<-rec.closed
			<-sc.closedCh
			if !errors.Is(sc.endErr, errFrame) {
				t.Errorf("the connection was closed because of %v", sc.endErr)
			}
			l.mu.Lock()
			reason := l.endErr
			l.mu.Unlock()
			if !errors.Is(reason, errFrame) {
				t.Errorf("the peer was told %v", reason)
			}
		})
	}
}

func TestGarbageToClient(t *testing.T) {
	frames := garbageFrames()
	delete(frames, "response")
	delete(frames, "goaway")
	frames["request"] = frameOf(header{kind: kindRequest, word: 1, id: 1}, nil, "")
	frames["cancel"] = frameOf(header{kind: kindCancel, id: 1}, nil, "")
	frames["response to nothing"] = frameOf(header{kind: kindResponse, id: makeID(1<<20, 1)}, nil, "")
	frames["broken status"] = frameOf(header{kind: kindResponse, word: 5, id: makeID(0, 1)}, nil, "\x12\x09abc")
	frames["broken goaway"] = frameOf(header{kind: kindGoAway, word: 5}, nil, "\x12\x09abc")
	for name, b := range frames {
		t.Run(name, func(t *testing.T) {
			testutil.CheckLeaks(t)
			a, l := newFakePair(t, 8, fakeMax)
			rec := &recorder{closed: make(chan struct{})}
			l.setHandler(rec)
			go l.drive()
			cl := newClient(a, nil, &ClientConfig{MaxInFlight: 4})
			defer cl.Close()
			result := make(chan error, 1)
			go func() { result <- cl.CallRaw(ctxFor(t), 1, []byte("x"), nil) }()
			testutil.Eventually(t, "the request has arrived", func() bool { return len(rec.got()) == 1 })
			if err := sendRaw(l, b); err != nil {
				t.Fatal(err)
			}
			err := <-result
			wantCode(t, err, Unavailable)
			if !errors.Is(err, errFrame) {
				t.Errorf("error %v does not say what happened", err)
			}
			<-rec.closed
		})
	}
}

// Late and repeated responses find no call.
func TestLateResponses(t *testing.T) {
	a, l := newFakePair(t, 8, fakeMax)
	rec := &recorder{closed: make(chan struct{})}
	l.setHandler(rec)
	go l.drive()
	cl := newClient(a, nil, &ClientConfig{MaxInFlight: 1})
	defer cl.Close()
	ctx, cancel := context.WithCancel(ctxFor(t))
	result := make(chan error, 1)
	go func() { result <- cl.CallRaw(ctx, 1, []byte("first"), nil) }()
	testutil.Eventually(t, "the request has arrived", func() bool { return len(rec.got()) == 1 })
	cancel()
	wantCode(t, <-result, Canceled)
	testutil.Eventually(t, "the cancel has arrived", func() bool { return len(rec.got()) == 2 })
	first, _ := parseHeader(rec.got()[0])
	if h, err := parseHeader(rec.got()[1]); err != nil || h.kind != kindCancel || h.id != first.id {
		t.Fatalf("%+v, %v, want a cancel of %#x", h, err, first.id)
	}
	// The slot is used again; the late response must not be taken for this call's.
	go func() {
		result <- cl.CallRaw(ctxFor(t), 1, []byte("second"), func(resp []byte) error {
			if string(resp) != "to the second" {
				t.Errorf("response %q", resp)
			}
			return nil
		})
	}()
	testutil.Eventually(t, "the request has arrived", func() bool { return len(rec.got()) == 3 })
	second, _ := parseHeader(rec.got()[2])
	if second.id == first.id || uint32(second.id) != uint32(first.id) {
		t.Fatalf("call ids %#x and %#x: want another generation of the same slot", first.id, second.id)
	}
	for _, f := range [][]byte{
		frameOf(header{kind: kindResponse, id: first.id}, nil, "to the first"),
		frameOf(header{kind: kindResponse, id: first.id, word: 5}, nil, ""),
		frameOf(header{kind: kindResponse, id: second.id + 1<<32}, nil, "to the third"),
		frameOf(header{kind: kindResponse, id: second.id}, nil, "to the second"),
		frameOf(header{kind: kindResponse, id: second.id}, nil, "again"),
	} {
		if err := sendRaw(l, f); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-result; err != nil {
		t.Fatal(err)
	}
}

// A client that takes no responses is cut off, and others are served meanwhile.
func TestStalledClient(t *testing.T) {
	testutil.CheckLeaks(t)
	a, l := newFakePair(t, 8, fakeMax)
	ts := newTestServer(&ServerConfig{MaxConcurrent: 2, StallTimeout: 1}) // a nanosecond
	defer ts.Close()
	sc, err := ts.attach(l, nil)
	if err != nil {
		t.Fatal(err)
	}
	l.stall.Store(true)
	go l.drive()
	for range 4 {
		if err := sendRaw(a, frameOf(header{kind: kindRequest, word: uint32(mEchoSlow), id: 1}, nil, "x")); err != nil {
			break // cut off already
		}
	}
	<-sc.closedCh
	if sc.endErr == nil || !strings.Contains(sc.endErr.Error(), "takes no responses") {
		t.Error(sc.endErr)
	}
}

// An inline handler that finds no send slot leaves its response to the outbox.
func TestInlineWithoutSendSlots(t *testing.T) {
	a, l := newFakePair(t, 64, fakeMax)
	ts := newTestServer(nil)
	defer ts.Close()
	if _, err := ts.attach(l, nil); err != nil {
		t.Fatal(err)
	}
	l.stall.Store(true)
	go l.drive()
	cl := newClient(a, nil, nil)
	defer cl.Close()
	q, err := cl.NewQueue(40)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	for tag := range uint64(40) {
		m := []Method{mEcho, mShrink, mFailLate, 999}[tag%4]
		if err := q.Start(ctxFor(t), m, pattern(int(tag)*10), tag); err != nil {
			t.Fatal(err)
		}
	}
	l.stall.Store(false)
	l.mu.Lock()
	l.changeLocked()
	l.mu.Unlock()
	for q.Len() > 0 {
		if _, err := q.Wait(ctxFor(t), func(tag uint64, resp []byte, err error) {
			switch tag % 4 {
			case 0, 1:
				if err != nil || string(resp) != string(pattern(int(tag)*10)) {
					t.Errorf("call %d: %d bytes, %v", tag, len(resp), err)
				}
			case 2:
				wantCode(t, err, Aborted)
			case 3:
				wantCode(t, err, Unimplemented)
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
}

// FuzzServer feeds a server whatever a client could send: it answers or closes the connection, and never panics.
func FuzzServer(f *testing.F) {
	f.Add(frameOf(header{kind: kindRequest, word: uint32(mEcho), id: 1, timeout: 5}, nil, "hello"), frameOf(header{kind: kindCancel, id: 1}, nil, ""))
	f.Add(frameOf(header{kind: kindRequest, word: uint32(mEchoSlow), id: 1}, []mr.RemoteKey{{Len: 1, Access: bulkAccess}}, "x"), []byte{})
	f.Add(frameOf(header{kind: kindRequest, word: 100, id: 1}, nil, "\x0a\x02\x08\x01"), frameOf(header{kind: kindResolve, id: 2}, nil, "test/Echo"))
	f.Add(frameOf(header{kind: kindRequest, word: uint32(mBig), id: 1}, nil, "\xff\xff\xff\xff"), frameOf(header{kind: kindResponse}, nil, ""))
	for _, b := range garbageFrames() {
		f.Add(b, b)
	}
	f.Fuzz(func(t *testing.T, first, second []byte) {
		if len(first) > fakeMax || len(second) > fakeMax {
			return
		}
		a, l := newFakePair(t, 8, fakeMax)
		ts := newTestServer(&ServerConfig{OnPanic: func(PanicInfo) {}})
		defer ts.Close()
		if _, err := ts.attach(l, nil); err != nil {
			t.Fatal(err)
		}
		rec := &recorder{closed: make(chan struct{})}
		a.setHandler(rec)
		close(ts.release)
		_, _ = sendRaw(a, first), sendRaw(a, second)
		for l.step() || a.step() {
		}
		for _, b := range rec.got() {
			if h, err := parseHeader(b); err != nil || h.kind != kindResponse {
				t.Errorf("the server answered with % x: %v", b, err)
			}
		}
	})
}

// FuzzClient feeds a client whatever a server could send.
func FuzzClient(f *testing.F) {
	id := makeID(0, 1)
	f.Add(frameOf(header{kind: kindResponse, id: id}, nil, "hello"), frameOf(header{kind: kindGoAway}, nil, ""))
	f.Add(frameOf(header{kind: kindResponse, id: id, word: 5, flags: 1}, nil, "\x12\x01x\x1a\x06\x0a\x01t\x12\x01v"), []byte{})
	f.Add(frameOf(header{kind: kindResponse, id: id}, nil, string(make([]byte, 500))), frameOf(header{kind: kindResponse, id: id}, nil, ""))
	for _, b := range garbageFrames() {
		f.Add(b, b)
	}
	f.Fuzz(func(t *testing.T, first, second []byte) {
		if len(first) > fakeMax || len(second) > fakeMax {
			return
		}
		a, l := newFakePair(t, 8, fakeMax)
		l.setHandler(&recorder{closed: make(chan struct{})})
		cl := newClient(a, nil, &ClientConfig{MaxInFlight: 2})
		defer cl.Close()
		q, err := cl.NewQueue(1)
		if err != nil {
			t.Fatal(err)
		}
		defer q.Close()
		if err := q.Start(context.Background(), 1, []byte("x"), 7); err != nil {
			t.Fatal(err)
		}
		_, _ = sendRaw(l, first), sendRaw(l, second)
		for a.step() || l.step() {
		}
		q.TryWait(func(tag uint64, resp []byte, err error) {
			if tag != 7 || err != nil && CodeOf(err) == OK {
				t.Errorf("tag %d, error %v", tag, err)
			}
		})
	})
}
