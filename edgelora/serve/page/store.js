// What the browser keeps. Storage may be full or forbidden; then the page works on and says what it could not keep.

/** One named value, in "localStorage" (until deleted) or "sessionStorage" (until the tab is closed). */
export class Kept {
  constructor(storage, name) {
    this.storage = storage;
    this.name = name;
    this.unkept = null;
  }

  read() {
    try {
      return window[this.storage].getItem(this.name) ?? this.unkept;
    } catch {
      return this.unkept;
    }
  }

  /** Returns whether it is kept; if not, it lasts until the page is left. null deletes it. */
  write(value) {
    this.unkept = value;
    try {
      if (value === null) window[this.storage].removeItem(this.name);
      else window[this.storage].setItem(this.name, value);
      return true;
    } catch {
      return false;
    }
  }
}
